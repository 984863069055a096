"""`python -m breaching_ext` is `breaching-ext`."""

from .cli import main

main()
