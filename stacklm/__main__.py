"""`python -m stacklm`: the command line, run from the checkout in the current directory."""

from stacklm.cli import main

main()
