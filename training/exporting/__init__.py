"""A model of ours -> formats of others, each compared with ours before it is put in place."""
