//! Python's logging, for warnings and for exceptions that nobody up the stack could take.

use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::IntoPyDict;

/// Log `message` and the traceback of `error` as an error of "pyvirtio".
pub fn exception(py: Python<'_>, message: &str, error: &PyErr) {
    if let Err(error) = try_log(py, message, error) {
        error.write_unraisable(py, None);
    }
}

/// Log `message` as a warning of "pyvirtio".
pub fn warning(py: Python<'_>, message: &str) {
    let logged = logger(py).and_then(|logger| logger.call_method1("warning", ("%s", message)));
    if let Err(error) = logged {
        error.write_unraisable(py, None);
    }
}

fn logger(py: Python<'_>) -> PyResult<Bound<'_, PyAny>> {
    static GET_LOGGER: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    GET_LOGGER.import(py, "logging", "getLogger")?.call1(("pyvirtio",))
}

fn try_log(py: Python<'_>, message: &str, error: &PyErr) -> PyResult<()> {
    let options = [("exc_info", (error.get_type(py), error.value(py), error.traceback(py)))].into_py_dict(py)?;
    logger(py)?.call_method("error", ("%s", message), Some(&options)).map(drop)
}
