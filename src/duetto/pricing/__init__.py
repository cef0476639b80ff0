"""What hardware gives, what a step costs there, and what was learned from steps that ran."""
