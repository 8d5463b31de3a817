"""`ita train` from a clone of the repository."""

from ita_segmentation.cli.main import run_by_name

if __name__ == "__main__":
    run_by_name("train")
