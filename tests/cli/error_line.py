"""What a command says when it fails."""


def error_line(capsys) -> str:
    """The one line of an error."""
    found = capsys.readouterr()
    assert "Traceback" not in found.err
    (line,) = (line for line in found.err.splitlines() if line.startswith("jaxclus: error:"))
    return line
