"""The rewrite passes. The folder stands at the top of the repository and is imported as fxmem.passes."""

if __name__ != "fxmem.passes":
    # A second import under another name would make a second class of every pass.
    raise ImportError(f"import fxmem.passes, not {__name__}")
