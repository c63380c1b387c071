"""`dino-serve bench`: what a service does under load, and how much of the machine that is."""
