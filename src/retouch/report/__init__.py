"""Evidence into leaderboards on the terminal and self-contained web pages."""
