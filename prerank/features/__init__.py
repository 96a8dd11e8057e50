"""Raw columns to model inputs: transforms fitted once and shipped, and histories cut strictly before a moment."""
