"""What a model is measured under (Context, Edit, Condition), and putting edits on it and taking them off."""
