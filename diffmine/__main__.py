"""`python -m diffmine`: the command, where its script is not on the path."""

from diffmine.cli import command

if __name__ == "__main__":
    command()
