"""`python -m tcm_fast`."""

from tcm_fast.cli.main import main

main()
