"""What people read: text, pages, pictures."""
