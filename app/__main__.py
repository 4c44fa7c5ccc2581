"""`python -m intarsia.app` is the same as `intarsia`."""

from .cli import main

if __name__ == "__main__":
    main()
