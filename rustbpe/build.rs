//! Copies the notebooks to `OUT_DIR`, from where maturin puts them into the wheel (`from = "out-dir"` in pyproject.toml).

use std::path::{Path, PathBuf};
use std::{env, fs, io};

/// The lessons, the stage notebooks with their presets, and the pages that they link to.
const FOLDERS: [&str; 2] = ["lessons", "nbs"];

/// Copies a folder, without hidden files and rendered copies.
fn copy(from: &Path, to: &Path) -> io::Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let name = entry.file_name();
        if name.to_string_lossy().starts_with(['.', '_']) {
            continue;
        }
        let target = to.join(name);
        if entry.file_type()?.is_dir() {
            copy(&entry.path(), &target)?;
        } else {
            fs::copy(entry.path(), target)?;
        }
    }
    Ok(())
}

fn main() -> io::Result<()> {
    println!("cargo:rerun-if-changed=build.rs");
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let tests = env::var_os("CARGO_FEATURE_PYTHON").is_none();
    // OUT_DIR is target/PROFILE/build/…
    let editable = out.components().any(|part| part.as_os_str() == "editable");
    if tests || editable {
        return Ok(());
    }
    // nbdev, which reads the notebooks of a clone, skips a folder with this underscore
    let notebooks = out.join("_notebooks");
    if notebooks.exists() {
        fs::remove_dir_all(&notebooks)?; // a notebook may have a new name
    }
    for folder in FOLDERS {
        println!("cargo:rerun-if-changed=../{folder}");
        copy(&Path::new("..").join(folder), &notebooks.join(folder))?;
    }
    Ok(())
}
