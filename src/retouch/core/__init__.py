"""The mechanics that techniques share; knows no technique. Import from the file that has what you need."""
