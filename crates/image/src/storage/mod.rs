//! What lies below a format.

mod file;

pub use file::StorageFile;
