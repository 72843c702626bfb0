"""`python -m llm_training_toolkit` is the command `ltt`."""

from llm_training_toolkit.cli import main

if __name__ == "__main__":
    main()
