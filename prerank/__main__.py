"""`python -m prerank` is `prerank`."""

from prerank.cli import main

main()
