"""`python -m app` is `dino-serve`."""

from app.cli import main

main()
