"""What `ray job submit ... -- python jobs/mine.py CONFIG.yaml [--section.key value ...]` runs: `diffmine mine`."""

import sys

from diffmine.cli import command

if __name__ == "__main__":
    command(["mine", *sys.argv[1:]])
