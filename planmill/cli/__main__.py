"""`python -m planmill.cli`, for where the script is not on the path."""

from planmill.cli import main

main()
