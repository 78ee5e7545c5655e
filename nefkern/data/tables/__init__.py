"""What the data sets' publishers define: names, numbers and colours of their classes."""
