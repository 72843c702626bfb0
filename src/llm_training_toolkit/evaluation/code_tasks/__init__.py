"""Tasks that run generated programs against unit tests: HumanEval and MBPP."""
