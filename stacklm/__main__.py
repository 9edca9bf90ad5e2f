"""`python -m stacklm`: the command line, with the code of the current directory's checkout."""

from stacklm.cli import main

main()
