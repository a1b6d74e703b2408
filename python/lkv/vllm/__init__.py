"""For vLLM: scores of what its cache holds, and what its layers keep."""
