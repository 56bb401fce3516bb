"""The command line: thin. It parses, calls the library, and prints; heavy imports wait until a command needs them."""
