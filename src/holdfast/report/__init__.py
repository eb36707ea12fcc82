"""What a run leaves for its reader: one page, one model card."""
