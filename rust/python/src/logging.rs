//! Python's logging, for exceptions that nobody up the stack could take.

use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::IntoPyDict;

/// Log `message` and the traceback of `error` as an error of "pyvirtio".
pub fn exception(py: Python<'_>, message: &str, error: &PyErr) {
    if let Err(error) = try_log(py, message, error) {
        error.write_unraisable(py, None);
    }
}

fn try_log(py: Python<'_>, message: &str, error: &PyErr) -> PyResult<()> {
    static GET_LOGGER: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    let logger = GET_LOGGER.import(py, "logging", "getLogger")?.call1(("pyvirtio",))?;
    let options = [("exc_info", (error.get_type(py), error.value(py), error.traceback(py)))].into_py_dict(py)?;
    logger.call_method("error", ("%s", message), Some(&options)).map(drop)
}
