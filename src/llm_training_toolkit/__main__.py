"""Entry point of `python -m llm_training_toolkit`, equal to the command `ltt`."""

from llm_training_toolkit.cli.app import main

if __name__ == "__main__":
    main()
