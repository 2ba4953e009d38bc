//! The core's errors as Python's: whose fault it was decides the class.

use std::io;

use pyo3::exceptions::{PyOSError, PyValueError};
use pyo3::prelude::*;

pyo3::import_exception!(pyvirtio.errors, GuestError);
pyo3::import_exception!(pyvirtio.errors, ProtocolError);
pyo3::import_exception!(pyvirtio.errors, StaleChain);

pub fn guest_error(error: pyvirtio_core::GuestError) -> PyErr {
    GuestError::new_err(error.0)
}

/// `OSError` with the errno; `ValueError` for what never reached the kernel.
pub fn os_error(error: io::Error) -> PyErr {
    match error.raw_os_error() {
        Some(errno) => {
            let text = error.to_string();
            let text = text.strip_suffix(&format!(" (os error {errno})")).unwrap_or(&text).to_owned();
            PyOSError::new_err((errno, text))
        }
        None => PyValueError::new_err(error.to_string()),
    }
}
