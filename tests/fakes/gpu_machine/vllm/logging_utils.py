"""vLLM's formatter, and the fields that it and vLLM's record factory add."""

import logging


class NewLineFormatter(logging.Formatter):
    """As vLLM's, but for line breaks."""

    def format(self, record: logging.LogRecord) -> str:
        record.vllm_process_name, record.fileinfo = "APIServer", record.filename
        return super().format(record)
