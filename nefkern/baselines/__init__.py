"""What the paper compares with: clusterings without eigenfunctions (section 4)."""
