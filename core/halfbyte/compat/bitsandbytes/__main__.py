"""`python -m bitsandbytes`: halfbyte's doctor."""

import sys

from halfbyte.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["doctor", *sys.argv[1:]]))
