"""Tiny Shakespeare as one text: found in a folder, or downloaded and checked.

Source: Karpathy 2015, https://github.com/karpathy/char-rnn: 40,000 lines of Shakespeare's plays; the text is in the
public domain.
"""

from __future__ import annotations

from pathlib import Path

from sources.download import Remote, fetch, folder_of, has_checksum

TEXT = Remote(
    "tinyshakespeare.txt",  # 1,115,394 bytes, ASCII, 65 symbols
    "sha256:86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    (
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        "https://storage.googleapis.com/download.tensorflow.org/data/shakespeare.txt",
        "https://cdn.jsdelivr.net/gh/karpathy/char-rnn@master/data/tinyshakespeare/input.txt",
    ),
)
# What other projects call the file, and the folders in which they keep it.
OTHER_NAMES = ("input.txt", "tinyshakespeare/input.txt", "shakespeare/input.txt", "shakespeare_char/input.txt")


def load(data_dir: str | Path | None = None, *, file: Remote | None = None, progress: bool = True) -> str:
    """The text, of 1,115,394 characters.

    Looked for in `data_dir` (None: the user's cache folder) under its name tinyshakespeare.txt, then as input.txt, in
    it or in a folder of that name; else downloaded into it. file: another one than TEXT.
    Errors, each with one line: ValueError for a file with other content, ConnectionError when no address delivered,
    OSError from the file system.
    """
    file, folder = file or TEXT, folder_of(data_dir)
    path = next((path for name in (file.name, *OTHER_NAMES) if (path := folder / name).is_file()), None)
    path = path or fetch(folder, file, progress)
    raw = path.read_bytes()
    if not has_checksum(raw, file):
        advice = f"delete it and run again, or, where it is a text of your own: --dataset {path}"
        raise ValueError(f"{path}: not tiny Shakespeare ({len(raw)} bytes, not of {file.checksum}); {advice}")
    return raw.decode("ascii")
