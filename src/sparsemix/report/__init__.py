"""What a comparison leaves for people: statistics with error bars and one HTML page."""
