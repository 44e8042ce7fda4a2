import sys

from ._load import main

if __name__ == "__main__":
    sys.exit(main())
