"""Document Registry and Document Repository over SQLAlchemy.

What the gateway uses: `Registry` and `Repository`, with the values that go in and come out of them.
"""

from xca_imaging.registry.document_registry import Registry
from xca_imaging.registry.documents import Content, StoredDocument
from xca_imaging.registry.provide import Repository
from xca_imaging.registry.search import Found
from xca_imaging.registry.submit import Registered

__all__ = ["Content", "Found", "Registered", "Registry", "Repository", "StoredDocument"]
