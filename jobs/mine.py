"""What `ray job submit ... -- python jobs/mine.py CONFIG.yaml [--section.key value ...]` runs: `diffmine mine`."""

import sys

from diffmine.cli import main

if __name__ == "__main__":
    sys.exit(main(["mine", *sys.argv[1:]]))
