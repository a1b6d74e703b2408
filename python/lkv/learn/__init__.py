"""Training of LKV: budgets of heads (LKV-H) and scores of tokens (LKV-T), end to end against a frozen teacher."""
