"""`make demo`: a model reads a long text, keeps a small part of its cache, and answers from what is left."""
