"""vLLM's log formatter with the fields that vLLM's record factory adds."""

import logging


class NewLineFormatter(logging.Formatter):
    """Formatter of vLLM's lines, without its handling of line breaks."""

    def format(self, record: logging.LogRecord) -> str:
        record.vllm_process_name, record.fileinfo = "APIServer", record.filename
        return super().format(record)
