"""`python -m tcm_fast`."""

from tcm_fast.cli import main

main()
