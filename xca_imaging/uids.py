"""URNs, OIDs, SOAP actions and namespaces, each with its source section.

References
----------
* [TF2-nn] IHE ITI TF-2, section 3.nn; [TF3-4.2] IHE ITI TF-3, section 4.2; [RAD-nn] IHE RAD TF-2, section 4.nn
"""

from __future__ import annotations

import re

# --- XML namespaces ---------------------------------------------------------------------------------------------------
NS_SOAP12 = "http://www.w3.org/2003/05/soap-envelope"  # SOAP 1.2 Part 1, 5.1
NS_SOAP11 = "http://schemas.xmlsoap.org/soap/envelope/"  # SOAP 1.1, 3
NS_WSA = "http://www.w3.org/2005/08/addressing"  # WS-Addressing 1.0 Core, 1.2
NS_XOP = "http://www.w3.org/2004/08/xop/include"  # XOP, 2.1
NS_XML = "http://www.w3.org/XML/1998/namespace"
NS_XDSB = "urn:ihe:iti:xds-b:2007"  # [TF2-43]
NS_XDSI = "urn:ihe:rad:xdsi-b:2009"  # [RAD-69]
NS_RIM = "urn:oasis:names:tc:ebxml-regrep:xsd:rim:3.0"  # ebRIM 3.0
NS_RS = "urn:oasis:names:tc:ebxml-regrep:xsd:rs:3.0"  # ebRS 3.0
NS_LCM = "urn:oasis:names:tc:ebxml-regrep:xsd:lcm:3.0"
NS_QUERY = "urn:oasis:names:tc:ebxml-regrep:xsd:query:3.0"
NS_RMD = "urn:ihe:iti:rmd:2017"  # ITI-86
NS_HL7V3 = "urn:hl7-org:v3"  # HL7 V3 XML ITS

# --- WS-Addressing 1.0 ------------------------------------------------------------------------------------------------
WSA_ANONYMOUS = "http://www.w3.org/2005/08/addressing/anonymous"  # Core, 2.1
WSA_NONE = "http://www.w3.org/2005/08/addressing/none"  # Core, 2.1
WSA_FAULT_ACTION = "http://www.w3.org/2005/08/addressing/fault"  # SOAP Binding, 6
SOAP_FAULT_ACTION = "http://www.w3.org/2005/08/addressing/soap/fault"  # SOAP Binding, 6

# --- SOAP actions -----------------------------------------------------------------------------------------------------
ITI18_REQUEST = "urn:ihe:iti:2007:RegistryStoredQuery"  # [TF2-18]
ITI18_RESPONSE = "urn:ihe:iti:2007:RegistryStoredQueryResponse"
ITI38_REQUEST = "urn:ihe:iti:2007:CrossGatewayQuery"  # [TF2-38]
ITI38_RESPONSE = "urn:ihe:iti:2007:CrossGatewayQueryResponse"
ITI39_REQUEST = "urn:ihe:iti:2007:CrossGatewayRetrieve"  # [TF2-39]
ITI39_RESPONSE = "urn:ihe:iti:2007:CrossGatewayRetrieveResponse"
ITI41_REQUEST = "urn:ihe:iti:2007:ProvideAndRegisterDocumentSet-b"  # [TF2-41]
ITI41_RESPONSE = "urn:ihe:iti:2007:ProvideAndRegisterDocumentSet-bResponse"
ITI42_REQUEST = "urn:ihe:iti:2007:RegisterDocumentSet-b"  # [TF2-42]
ITI42_RESPONSE = "urn:ihe:iti:2007:RegisterDocumentSet-bResponse"
ITI43_REQUEST = "urn:ihe:iti:2007:RetrieveDocumentSet"  # [TF2-43]
ITI43_RESPONSE = "urn:ihe:iti:2007:RetrieveDocumentSetResponse"
ITI44_ADD = "urn:hl7-org:v3:PRPA_IN201301UV02"  # [TF2-44]
ITI44_REVISE = "urn:hl7-org:v3:PRPA_IN201302UV02"
ITI44_MERGE = "urn:hl7-org:v3:PRPA_IN201304UV02"
ITI44_RESPONSE = "urn:hl7-org:v3:MCCI_IN000002UV01"
ITI51_REQUEST = "urn:ihe:iti:2009:MultiPatientStoredQuery"  # [TF2-51]
ITI51_RESPONSE = "urn:ihe:iti:2009:MultiPatientStoredQueryResponse"
ITI57_REQUEST = "urn:ihe:iti:2010:UpdateDocumentSet"  # XDS Metadata Update, 3.57
ITI57_RESPONSE = "urn:ihe:iti:2010:UpdateDocumentSetResponse"
ITI61_REQUEST = "urn:ihe:iti:2010:RegisterOnDemandDocumentEntry"  # [TF2-61]
ITI61_RESPONSE = "urn:ihe:iti:2010:RegisterOnDemandDocumentResponse"  # [TF2-61]: without "Entry"
ITI62_REQUEST = "urn:ihe:iti:2010:DeleteDocumentSet"  # Remove Metadata and Documents, 3.62
ITI62_RESPONSE = "urn:ihe:iti:2010:DeleteDocumentSetResponse"
ITI86_REQUEST = "urn:ihe:iti:2017:RemoveDocuments"  # Remove Metadata and Documents, 3.86
ITI86_RESPONSE = "urn:ihe:iti:2017:RemoveDocumentsResponse"
RAD69_REQUEST = "urn:ihe:rad:2009:RetrieveImagingDocumentSet"  # [RAD-69]
RAD69_RESPONSE = ITI43_RESPONSE  # [RAD-69]: the answer carries the action of ITI-43
RAD75_REQUEST = "urn:ihe:rad:2011:CrossGatewayRetrieveImagingDocumentSet"  # [RAD-75]
RAD75_RESPONSE = "urn:ihe:rad:2011:CrossGatewayRetrieveImagingDocumentSetResponse"

# --- Status and severity [TF3-4.2, 4.2.4] -----------------------------------------------------------------------------
STATUS_SUCCESS = "urn:oasis:names:tc:ebxml-regrep:ResponseStatusType:Success"
STATUS_PARTIAL_SUCCESS = "urn:ihe:iti:2007:ResponseStatusType:PartialSuccess"  # IHE's, not OASIS's
STATUS_FAILURE = "urn:oasis:names:tc:ebxml-regrep:ResponseStatusType:Failure"
SEVERITY_ERROR = "urn:oasis:names:tc:ebxml-regrep:ErrorSeverityType:Error"
SEVERITY_WARNING = "urn:oasis:names:tc:ebxml-regrep:ErrorSeverityType:Warning"

# --- availabilityStatus [TF3-4.2, 4.2.3.2.2] --------------------------------------------------------------------------
APPROVED = "urn:oasis:names:tc:ebxml-regrep:StatusType:Approved"
DEPRECATED = "urn:oasis:names:tc:ebxml-regrep:StatusType:Deprecated"

# --- documentAvailability [TF3-4.2, 4.2.3.2.30] -----------------------------------------------------------------------
DOCUMENT_ONLINE = "urn:ihe:iti:2010:DocumentAvailability:Online"
DOCUMENT_OFFLINE = "urn:ihe:iti:2010:DocumentAvailability:Offline"

# --- Object types [TF3-4.2, 4.2.3.1] ----------------------------------------------------------------------------------
STABLE_DOCUMENT = "urn:uuid:7edca82f-054d-47f2-a032-9b2a5b5186c1"
ON_DEMAND_DOCUMENT = "urn:uuid:34268e47-fdf5-41a6-ba33-82133c465248"
SUBMISSION_SET_NODE = "urn:uuid:a54d6aa5-d40d-43f9-88c5-b4633d873bdd"
FOLDER_NODE = "urn:uuid:d9d542f3-6cc4-48b6-8870-ea235fbc94c2"

# --- Association types [TF3-4.2, 4.2.2] -------------------------------------------------------------------------------
HAS_MEMBER = "urn:oasis:names:tc:ebxml-regrep:AssociationType:HasMember"
RPLC = "urn:ihe:iti:2007:AssociationType:RPLC"
APND = "urn:ihe:iti:2007:AssociationType:APND"
XFRM = "urn:ihe:iti:2007:AssociationType:XFRM"
XFRM_RPLC = "urn:ihe:iti:2007:AssociationType:XFRM_RPLC"
SIGNS = "urn:ihe:iti:2007:AssociationType:signs"
IS_SNAPSHOT_OF = "urn:ihe:iti:2010:AssociationType:IsSnapshotOf"
UPDATE_AVAILABILITY_STATUS = "urn:ihe:iti:2010:AssociationType:UpdateAvailabilityStatus"  # 3.57
SUBMIT_ASSOCIATION = "urn:ihe:iti:2010:AssociationType:SubmitAssociation"  # 3.57

# --- Reference id types [TF3-4.2, 4.2.3.1.7: CXi] ---------------------------------------------------------------------
REFERENCE_STUDY_INSTANCE_UID = "urn:ihe:iti:xds:2016:studyInstanceUID"
REFERENCE_ACCESSION = "urn:ihe:iti:xds:2013:accession"
REFERENCE_ORDER = "urn:ihe:iti:xds:2013:order"
REFERENCE_UNIQUE_ID = "urn:ihe:iti:xds:2013:uniqueId"

# --- DICOM ------------------------------------------------------------------------------------------------------------
KOS_SOP_CLASS = "1.2.840.10008.5.1.4.1.1.88.59"  # PS3.4 B.5, Key Object Selection Document Storage
DICOM_UID_REGISTRY = "1.2.840.10008.2.6.1"  # PS3.6 A: coding scheme of formatCode when the code is a SOP class
DICOM_CONTROLLED_TERMINOLOGY = "1.2.840.10008.2.16.4"  # PS3.16 Table 8-1: DCM
VERIFICATION_SOP_CLASS = "1.2.840.10008.1.1"  # PS3.4 A
IMPLICIT_VR_LITTLE_ENDIAN = "1.2.840.10008.1.2"  # PS3.5 A.1
EXPLICIT_VR_LITTLE_ENDIAN = "1.2.840.10008.1.2.1"  # PS3.5 A.2
EXPLICIT_VR_BIG_ENDIAN = "1.2.840.10008.1.2.2"  # PS3.5 A.3, retired
APPLICATION_CONTEXT = "1.2.840.10008.3.1.1.1"  # PS3.7 A.2.1

IMPLEMENTATION_CLASS_UID = "2.25.49290241351938794531957646146326518565"  # ours: UUID-derived, PS3.5 B.2
IMPLEMENTATION_VERSION_NAME = "XCA_IMAGING_01"  # at most 16 characters, PS3.7 D.3.3.2

MIME_DICOM = "application/dicom"  # RFC 3240

OID_PREFIX = "urn:oid:"
UUID_PREFIX = "urn:uuid:"

UID_LENGTH = 64  # PS3.5 9.1
_UID = re.compile(r"[0-9]+(\.[0-9]+)+")


def is_uid(value: str) -> bool:
    """Tell whether a value can be a UID (PS3.5 9.1): leading zeros are let pass, as archives do.

    UIDs become file names, query keys and parts of messages: nothing but digits and dots gets past here, no wildcard
    and no backslash.
    """
    return len(value) <= UID_LENGTH and _UID.fullmatch(value) is not None
