"""edm_neon.py with few real glyphs: whole runs in tests then take a third of the time.

Imported it changes the module for this process; as a script it is edm_neon.py.
"""

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import edm_neon as edm  # noqa: E402

edm.Glyphs.images = dict.fromkeys(edm.Glyphs.images, 400)
edm.GlyphsClassifier = partial(edm.GlyphsClassifier, images=1000, epochs=1)

if __name__ == "__main__":
    edm.main()
