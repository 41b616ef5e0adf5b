"""`python -m perl` is `perl-rlhf`."""

from perl.cli import main

if __name__ == "__main__":
    main()
