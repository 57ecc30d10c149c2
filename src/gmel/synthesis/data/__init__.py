"""Data of the room: folders of photos become data sets that are checked, grouped and split without leaks."""
