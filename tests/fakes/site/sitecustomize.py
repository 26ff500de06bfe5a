"""On PYTHONPATH, makes every Python process of a command one on the board that NTOPS_MLA_TEST_BOARD names."""

import os
import pathlib
import sys

if os.environ.get("NTOPS_MLA_TEST_BOARD"):
    sys.path.append(str(pathlib.Path(__file__).resolve().parent.parent))
    import vendor_board

    vendor_board.arrange(os.environ["NTOPS_MLA_TEST_BOARD"])
