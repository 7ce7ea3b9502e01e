"`python -m dalle_edu …` is `dalle-edu …`: what a launcher of several processes needs"
import sys
from .cli import main

if __name__ == "__main__": sys.exit(main())
