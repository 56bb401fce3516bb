"""retouch changes what a trained model knows, and shows that it changed.

Ten verbs, one room each, one published technique a file. Import a technique from its file,
`from retouch.forget.ssd import ssd`, so that a name never means two things and nothing heavy is loaded before its use.
"""

__version__ = "0.1.0"
