"""The paper's ablations on the miniature: which orderings of its tables come out, with numbers and pictures."""
