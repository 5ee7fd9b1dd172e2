"""The command line: commands over ``sealift.client``, and nothing else of Sealift's behind it.

Modules here import only click and the standard library at the top; what is slow to import (pydantic, httpx2, rich) is
imported where it is used, so that ``sealift --help`` is there at once.
"""
