"""What a person looks at: layouts, the contact sheet and its HTML page."""
